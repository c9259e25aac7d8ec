"""Commands that look whether things are as they should be, and say what they need."""
