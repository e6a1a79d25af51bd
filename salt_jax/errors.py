"""What may go wrong that is the user's to mend."""


class UserError(Exception):
    """One sentence that names the file, key or value and the remedy; launch/ prints it and exits with code 2."""
