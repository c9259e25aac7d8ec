"""The application that commands are about: where it is found, which files it has, and how one is begun."""
