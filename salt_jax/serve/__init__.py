"""Videos in a browser while they are made: `app.make_app`."""
