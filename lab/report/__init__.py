"""Tables from records. Never computes what a record does not hold."""
