-- What the doctor does is bounded, and no name is looked up in a schema of somebody else's.
select
  pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
  pg_catalog.set_config('statement_timeout', '30s', true),
  pg_catalog.set_config('lock_timeout', '5s', true)
