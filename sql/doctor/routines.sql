-- The functions and views that there are, for the program to hold against its own text.
select
  p.proname::text as name,
  'function' as kind,
  p.prosrc as body,
  l.lanname::text as language,
  case p.provolatile when 'i' then 'immutable' when 's' then 'stable' else 'volatile' end as volatility,
  p.proisstrict as is_strict,
  p.proparallel = 's' as is_parallel_safe,
  p.prosecdef as is_definer,
  coalesce(p.proconfig, '{}') as settings
from pg_proc p
join pg_language l on l.oid = p.prolang
where p.pronamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
union all
select c.relname::text, 'view', null, null, null, null, null, null, null
from pg_class c
where c.relkind = 'v'
  and c.relnamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
