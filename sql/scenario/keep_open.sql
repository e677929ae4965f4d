-- The transaction that holds a claim says nothing until the play is over. (PostgreSQL 17 has the second of these.)
select pg_catalog.set_config(s.name, '0', true)
from pg_catalog.pg_settings s
where s.name in ('idle_in_transaction_session_timeout', 'transaction_timeout')
