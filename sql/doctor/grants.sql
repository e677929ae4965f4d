-- Roles that may do a part of what they are for: the first call that they may not make fails. Whoever may call what only the
-- program calls is to have all that the program calls; who works by SQL alone needs no more than the verbs that it uses. What belongs together is
-- what the README grants ("Roles"), and a test holds this list against it.
--
-- Of a role that others are members of, those count that log in: they may have the rest by way of another one.
with home as (
  select c.relnamespace as oid from pg_class c where c.oid = 'pgonce.schema_versions'::regclass
),
functions (anchor, name) as (
  select 'beat', f.name
  from unnest(array[
    'relay', 'receive', 'receive_seen', 'seen_progress', 'open_batch', 'open_messages', 'apply_statements',
    'try_statements', 'fail', 'hand_over', 'finish_handover', 'bury', 'process_once', 'watch', 'beat', 'leave',
    'take_suspicion', 'clear_suspicion', 'set_delivery', 'acquire', 'peek', 'ack', 'nack', 'renew', 'release', 'sample_rates',
    'record_handler_times', 'emit', 'emitted_id', 'checkpoint_if_due']) f(name)
  union all
  select 'enqueue_many', f.name from unnest(array['enqueue', 'cancel']) f(name)
),
relations (anchor, name, privilege) as (
  select 'beat', r.name, 'select'
  from unnest(array['received', 'topics', 'consumers', 'state_tables', 'schema_versions', 'word_counts']) r(name)
  union all
  values ('beat', 'word_counts', 'insert'), ('beat', 'word_counts', 'update'), ('enqueue_many', 'schema_versions', 'select')
),
granted as (
  select p.proname as anchor, a.grantee
  from pg_proc p
  cross join lateral aclexplode(p.proacl) a
  where p.pronamespace = (select h.oid from home h) and a.grantee not in (0, p.proowner)
  union
  select 'select', a.grantee
  from pg_class c
  cross join lateral aclexplode(c.relacl) a
  where c.relnamespace = (select h.oid from home h) and c.relkind in ('r', 'v') and a.grantee not in (0, c.relowner)
),
members as (
  select g.anchor, g.grantee, r.oid
  from granted g
  join pg_roles r on r.rolcanlogin and not r.rolsuper and r.oid <> g.grantee and pg_has_role(r.oid, g.grantee, 'usage')
),
holders as (
  select m.anchor, m.oid from members m
  union
  select g.anchor, g.grantee
  from granted g
  where not exists (select from members m where m.anchor = g.anchor and m.grantee = g.grantee)
),
missing as (
  select h.oid, format('usage on schema %s', s.oid::regnamespace) as privilege
  from holders h
  cross join home s
  where not has_schema_privilege(h.oid, s.oid, 'usage')
  union
  select h.oid, format('execute on function %s.%I', s.oid::regnamespace, p.proname)
  from holders h
  cross join home s
  join functions f on f.anchor = h.anchor
  join pg_proc p on p.pronamespace = s.oid and p.proname = f.name
  where not has_function_privilege(h.oid, p.oid, 'execute')
  union
  select h.oid, format('%s on %s.%I', r.privilege, s.oid::regnamespace, c.relname)
  from holders h
  cross join home s
  join relations r on r.anchor = h.anchor
  join pg_class c on c.relnamespace = s.oid and c.relname = r.name and c.relkind in ('r', 'v')
  where not has_table_privilege(h.oid, c.oid, r.privilege)
  union
  select h.oid, format('usage on sequence %s.%I', s.oid::regnamespace, c.relname)
  from holders h
  cross join home s
  join pg_class c on c.relnamespace = s.oid and c.relname = 'looks' and c.relkind = 'S'
  where h.anchor = 'beat' and not has_sequence_privilege(h.oid, c.oid, 'usage')
  union
  select h.oid, format('execute on function %s.%I', s.oid::regnamespace, p.proname)
  from home s
  join pg_proc p on p.pronamespace = s.oid and p.proname = 'current_rates'
  join pg_class c on c.relnamespace = s.oid and c.relname = 'rates' and c.relkind = 'v'
  join holders h on h.anchor = 'select' and has_table_privilege(h.oid, c.oid, 'select')
  where not has_function_privilege(h.oid, p.oid, 'execute')
)
select
  'grants' as "check",
  format('role %s lacks %s', m.oid::regrole, m.privilege) as subject,
  format('grant %s to %s', m.privilege, m.oid::regrole) as remedy
from missing m
union all
-- A function with the rights of its owner, who has none to what belongs to another role, and what a function writes.
select
  'grants',
  format('%s %s belongs to %s, and the rest to %s', o.kind, o.name, o.owner::regrole, h.relowner::regrole),
  format('alter %s %s owner to %s', o.kind, o.name, h.relowner::regrole)
from pg_class h
cross join lateral (
  select 'function' as kind, p.oid::regprocedure::text as name, p.proname as bare_name, p.proowner as owner
  from pg_proc p
  where p.pronamespace = h.relnamespace
  union all
  select case c.relkind when 'v' then 'view' else 'table' end, c.oid::regclass::text, c.relname, c.relowner
  from pg_class c
  where c.relnamespace = h.relnamespace and c.relkind in ('r', 'v')) o
where h.oid = 'pgonce.schema_versions'::regclass and o.owner <> h.relowner
  and (o.kind = 'table' or o.bare_name = any (array(select unnest(v.routines) from pgonce.schema_versions v)))
order by 2
