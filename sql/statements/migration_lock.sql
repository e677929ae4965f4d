select pg_advisory_xact_lock(hashtextextended('pgonce ' || $1, 0))
