-- Everything in the schema $1, a line an object.
with home as (select n.oid, n.nspowner::regrole as owner from pg_namespace n where n.nspname = $1)
select line
from (
  select concat_ws(' | ', 'relation', c.relname, c.relkind, c.relowner::regrole, c.relacl, c.reloptions, obj_description(c.oid, 'pg_class'),
                   case when c.relkind = 'v' then pg_get_viewdef(c.oid) when c.relkind = 'i' then pg_get_indexdef(c.oid) end) as line
  from pg_class c join home on home.oid = c.relnamespace
  union all
  select concat_ws(' | ', 'column', c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attcollation,
                   a.attidentity, a.attacl, pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum))
  from pg_class c join home on home.oid = c.relnamespace
  join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
  left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
  union all
  select concat_ws(' | ', 'constraint', k.conrelid::regclass, k.conname, pg_get_constraintdef(k.oid))
  from pg_constraint k join home on home.oid = k.connamespace
  union all
  select concat_ws(' | ', 'sequence', s.seqrelid::regclass, s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle)
  from pg_sequence s join pg_class c on c.oid = s.seqrelid join home on home.oid = c.relnamespace
  union all
  select concat_ws(' | ', 'function', p.oid::regprocedure, p.proowner::regrole, p.proacl, pg_get_functiondef(p.oid), obj_description(p.oid, 'pg_proc'))
  from pg_proc p join home on home.oid = p.pronamespace
  union all
  select concat_ws(' | ', 'type', t.typname, t.typtype, t.typowner::regrole, obj_description(t.oid, 'pg_type'))
  from pg_type t join home on home.oid = t.typnamespace
  union all
  select concat_ws(' | ', 'schema', home.owner) from home) s
order by line
