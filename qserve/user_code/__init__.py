"""What can be seen of user code without running it, and what qserve keeps in objects of user classes."""
