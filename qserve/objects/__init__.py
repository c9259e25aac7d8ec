"""Objects of user classes, and what qserve does with them where they are."""
