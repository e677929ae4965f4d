-- What others hold is not waited for long.
select pg_catalog.set_config('lock_timeout', '2s', true)
