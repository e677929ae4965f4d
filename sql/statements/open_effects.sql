-- For the handler's transaction, where it is not the one that receives: its limits, and what batch_is_open asks for.
select
  pg_catalog.set_config('statement_timeout', $1, true),
  pg_catalog.set_config('idle_in_transaction_session_timeout', $2, true),
  pg_catalog.set_config('pgonce_batch.is_open', 'true', true)
