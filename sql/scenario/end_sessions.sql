-- Ends what the processes of a play left: a session that waits for a lock does not notice by itself that nobody is there.
select pg_terminate_backend(a.pid) as is_ended
from pg_stat_activity a
where a.datname = current_database() and a.application_name = $1
