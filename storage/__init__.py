"""What must survive: the ledger in Postgres, payloads in the object store, short-lived state in Redis."""
