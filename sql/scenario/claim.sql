-- Says that somebody plays in this schema ($1), until the transaction ends; false where somebody does already.
select pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended($1, 0)) as is_claimed
