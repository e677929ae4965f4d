-- Who answers, and as whom. In no transaction of the doctor's yet, so that every name is qualified.
select
  pg_catalog.pg_backend_pid() as pid,
  pg_catalog.quote_ident(current_user) as role,
  pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(c.relowner)) as owner,
  (select r.rolsuper from pg_catalog.pg_roles r where r.oid operator(pg_catalog.=) c.relowner) as owner_is_superuser,
  extract(epoch from pg_catalog.clock_timestamp())::float8 as seconds
from pg_catalog.pg_class c
where c.oid operator(pg_catalog.=) 'pgonce.schema_versions'::regclass
