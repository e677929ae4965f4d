-- Prepared transactions. Snapshots list those of every database of the server.
select
  'prepared-transactions' as "check",
  format('transaction %L in database %s is prepared since %s', x.gid, x.database, date_trunc('second', x.prepared)) as subject,
  format('in database %s: commit prepared %L, or rollback prepared %L', x.database, x.gid, x.gid) as remedy
from pg_prepared_xacts x
order by x.prepared
limit 100
