"""Large values on their way between processes: lent where one can read the other's memory, else sent in chunks."""
