-- Other schemas of this database that look like pgonce's. Which version they are of is asked of them, where the role may.
select
  n.nspname::text as name,
  quote_ident(n.nspname) as quoted,
  -- A play that is going on has a lock on its name (sql/scenario/claim.sql).
  n.nspname ~ '^pgonce_(demo|scenario)' and not exists (
    select from pg_locks l
    where l.locktype = 'advisory' and l.objsubid = 1
      and l.database = (select b.oid from pg_database b where b.datname = current_database())
      and (l.classid::bigint << 32) | l.objid::bigint = hashtextextended(n.nspname, 0)) as is_left,
  has_schema_privilege(n.oid, 'usage') and has_table_privilege(v.oid, 'select') as may_read
from pg_class v
join pg_namespace n on n.oid = v.relnamespace
where v.relname = 'schema_versions' and v.relkind = 'r'
  and exists (
    select from pg_attribute a where a.attrelid = v.oid and a.attname = 'routines_digest' and not a.attisdropped)
  and v.oid is distinct from to_regclass('pgonce.schema_versions')
order by 1
limit 1000
