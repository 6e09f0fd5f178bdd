"""The ledger in Postgres, payloads in the object store, and in Redis what may be lost."""
