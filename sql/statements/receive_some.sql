-- Before anything is received the transaction gets its limits, also where nothing is: neither a statement of the handler nor the
-- silence between two of them lasts longer.
with limits as materialized (
  select
    pg_catalog.set_config('statement_timeout', $5, true) as of_statements,
    pg_catalog.set_config('idle_in_transaction_session_timeout', $6, true) as of_silence
)
select r.partition, r."offset", r.message_id, r.key, r.payload, r.headers, r.enqueued_at, r.attempt
from pgonce.receive($1, max => $2, partition => $3, suspects => $4) r
where (select l.of_statements is not null and l.of_silence is not null from limits l)
