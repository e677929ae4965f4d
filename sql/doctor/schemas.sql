-- Other schemas of this database that look like pgonce's. Which version they are of is asked of them, where the role may.
select
  n.nspname::text as name,
  quote_ident(n.nspname) as quoted,
  n.nspname ~ '^pgonce_(demo|scenario)' as is_play,
  has_schema_privilege(n.oid, 'usage') and has_table_privilege(v.oid, 'select') as may_read
from pg_class v
join pg_namespace n on n.oid = v.relnamespace
where v.relname = 'schema_versions' and v.relkind = 'r'
  and exists (
    select from pg_attribute a where a.attrelid = v.oid and a.attname = 'routines_digest' and not a.attisdropped)
  and v.oid <> 'pgonce.schema_versions'::regclass
order by 1
limit 1000
