-- Who answers, and as whom.
select
  pg_backend_pid() as pid,
  current_user::text as role,
  pg_get_userbyid(c.relowner)::text as owner,
  extract(epoch from clock_timestamp())::float8 as seconds
from pg_class c
where c.oid = 'pgonce.schema_versions'::regclass
