"""What compiled programs exchange, need and cost, on chips that need not be here."""
