-- A program that has nothing to do between its statements, and is silent, was stopped.
select pg_catalog.set_config('idle_in_transaction_session_timeout', '30s', true)
