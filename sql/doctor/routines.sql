-- The functions and views that there are, for the program to hold against its own text.
select
  p.proname::text as name,
  'function' as kind,
  p.prosrc as body,
  p.prosecdef as is_definer,
  coalesce(p.proconfig, '{}') as settings
from pg_proc p
where p.pronamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
union all
select c.relname::text, 'view', null, false, '{}'
from pg_class c
where c.relkind = 'v'
  and c.relnamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
