"""Large values between processes of one host: lent in memory files, and copied out of them."""
