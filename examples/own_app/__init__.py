"""An application in containers of its own: copy this folder to begin with."""
