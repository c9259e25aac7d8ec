"""Redis: how it is reached, and every command that qserve sends to it."""
