"""Files of tensors, of networks, of words and of videos."""
