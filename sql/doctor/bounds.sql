-- What the doctor does is bounded, no name is looked up in a schema of somebody else's, and texts are written and read as
-- they are where nobody has set anything.
select
  pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
  pg_catalog.set_config('statement_timeout', '30s', true),
  pg_catalog.set_config('lock_timeout', '5s', true),
  pg_catalog.set_config('quote_all_identifiers', 'off', true),
  pg_catalog.set_config('standard_conforming_strings', 'on', true)
