-- The statements of the consumer find `received`, and tables of pgonce, behind what their own search_path shows.
with opened as materialized (
  select
    pgonce.open_batch($1, max => $2, partition => $5, suspects => $6) as messages,
    pg_catalog.set_config('statement_timeout', $4, true) as of_statements,
    pg_catalog.set_config('idle_in_transaction_session_timeout', $7, true) as of_silence,
    pg_catalog.set_config(
      'search_path',
      pg_catalog.concat_ws(', ', nullif(pg_catalog.current_setting('search_path'), ''), pg_catalog.quote_ident($3)),
      true) as path
)
select
  o.messages,
  o.messages operator(pg_catalog.>) 0
    and pg_catalog.current_setting('pgonce_batch.is_of_parked') operator(pg_catalog.=) 'true' as has_failed_before,
  o.path is not null and pg_catalog.to_regclass('received') operator(pg_catalog.=) 'pgonce.received'::pg_catalog.regclass as finds_received
from opened o
