-- The sessions of the processes of a play, and how many of them wait for another one.
select count(*) as sessions,
       count(*) filter (where cardinality(pg_blocking_pids(a.pid)) > 0) as waiting
from pg_stat_activity a
where a.datname = current_database() and a.application_name = $1
