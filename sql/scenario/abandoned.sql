-- The schemas of plays that belong to this role: of their pattern, and with what a play makes first. Whether somebody still
-- plays there is not known yet.
select n.nspname::text as schema
from pg_catalog.pg_namespace n
join pg_catalog.pg_roles r on r.oid = n.nspowner
where n.nspname ~ '^pgonce_scenario_[0-9a-f]{32}$'
  and r.rolname = current_user
  and exists (
    select from pg_catalog.pg_class c
    where c.relnamespace = n.oid and c.relkind = 'r' and c.relname in ('plain_queue', 'schema_versions')
  )
order by n.nspname
