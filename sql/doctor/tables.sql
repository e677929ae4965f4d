-- Tables and their columns, held against those that the migrations make (a test holds this list against them), and what a
-- crash of the server would empty.
with expected (relation, columns) as (values
  ('schema_versions',
   'version integer not null, program text not null, routines_digest text not null, routines text[] not null, installed_at timestamp with time zone not null default'),
  ('topics',
   'topic_id integer not null identity, topic text not null, partitions integer not null, payload_bytes_max integer not null, paused boolean not null default, created_at timestamp with time zone not null default'),
  ('partitions',
   'topic_id integer not null, partition integer not null'),
  ('outbox',
   'seq bigint not null default, enqueued_at timestamp with time zone not null default, deliver_at timestamp with time zone, topic_id integer not null, partition integer not null, bytes integer not null, status text not null default, message_id text not null, key text, payload jsonb not null, headers jsonb'),
  ('duplicate_sends',
   'sent_at timestamp with time zone not null default, messages bigint not null default, topic_id integer not null, message_id text'),
  ('heads',
   'topic_id integer not null, partition integer not null, generation bigint not null, next_offset bigint not null, scanned bigint not null, floor bigint not null, open_xids xid8[] not null, open_from bigint[] not null, candidate_seq bigint, candidate_xid xid8, moved bigint not null'),
  ('queue',
   'offset bigint not null, enqueued_at timestamp with time zone not null, topic_id integer not null, partition integer not null, bytes integer not null, message_id text not null, key text, payload jsonb not null, headers jsonb'),
  ('set_aside',
   'topic_id integer not null, partition integer not null, seq bigint not null, message_id text not null, key text, payload jsonb not null, headers jsonb, reason text not null, set_aside_at timestamp with time zone not null default'),
  ('consumers',
   'consumer_id integer not null identity, consumer text not null, topic_id integer, paused boolean not null default, kind text not null default, failure_policy text not null default, attempts_max integer not null default, backoff_min_ms integer not null default, backoff_max_ms integer not null default, delivery text not null default, created_at timestamp with time zone not null default'),
  ('consumer_partitions',
   'consumer_id integer not null, partition integer not null'),
  ('progress',
   'consumer_id integer not null, partition integer not null, generation bigint not null, next_offset bigint not null, received bigint not null, duplicates bigint not null, failures bigint not null default, dead bigint not null default, writer xid8 not null default, was_parked boolean not null default, handler xid8, handed_over bigint[]'),
  ('leases',
   'epoch bigint not null default, leased_until timestamp with time zone, careful_until bigint not null default, tried_offset bigint, fenced bigint not null default, owner uuid, consumer_id integer not null, partition integer not null, was_member boolean not null default'),
  ('processed_ids',
   'offset bigint, processed_at timestamp with time zone not null default, consumer_id integer not null, partition integer, message_id text not null'),
  ('parked',
   'offset bigint not null, enqueued_at timestamp with time zone not null, parked_at timestamp with time zone not null default, due_at timestamp with time zone, taken_by xid8, consumer_id integer not null, partition integer not null, attempts integer not null, bytes integer not null, message_id text not null, key text, error text, payload jsonb not null, headers jsonb, is_suspect boolean not null default'),
  ('dead_letters',
   'dead_letter_id bigint not null identity, offset bigint not null, enqueued_at timestamp with time zone not null, failed_at timestamp with time zone not null default, settled_at timestamp with time zone, consumer_id integer not null, partition integer not null, attempts integer not null, bytes integer not null, state text not null default, message_id text not null, key text, error text not null, settled_by name, payload jsonb not null, headers jsonb'),
  ('members',
   'member_id uuid not null, pid integer not null, consumers text[] not null, joined_at timestamp with time zone not null default, beat_at timestamp with time zone not null default'),
  ('suspicions',
   'until_offset bigint not null, tried_offset bigint, tried_by uuid, tried_at timestamp with time zone, consumer_id integer not null, partition integer not null, tried_pid integer, messages integer not null, raised_at timestamp with time zone not null default'),
  ('duplicate_receipts',
   'received_at timestamp with time zone not null default, messages bigint not null default, consumer_id integer not null, message_id text'),
  ('samples',
   'sampled_at timestamp with time zone not null, applied bigint, duplicates bigint not null, retries bigint, dead_letters bigint, fenced bigint, id integer not null, stage text not null'),
  ('handler_times',
   'recorded_at timestamp with time zone not null default, limit_ms bigint not null, consumer_id integer not null, buckets integer[] not null, calls bigint[] not null'),
  ('word_counts',
   'consumer text not null, word text not null, count bigint not null'),
  ('queue_floors',
   'topic_id integer not null, partition integer not null, floor bigint not null default'),
  ('state_tables',
   'consumer_id integer not null, relation regclass not null'),
  ('checkpoints',
   'checkpoint_id bigint not null identity, taken_at timestamp with time zone not null default, row_count bigint not null default, consumer_id integer not null, is_scheduled boolean not null default, checkpoint text not null, taken_by name not null default'),
  ('checkpoint_offsets',
   'checkpoint_id bigint not null, partition integer not null, next_offset bigint not null, received bigint not null, duplicates bigint not null, failures bigint not null, dead bigint not null'),
  ('checkpoint_tables',
   'checkpoint_id bigint not null, relation regclass not null, columns text[] not null'),
  ('checkpoint_parts',
   'checkpoint_id bigint not null, relation regclass not null, rows text[] not null')
),
home as (
  select c.relnamespace as oid from pg_class c where c.oid = 'pgonce.schema_versions'::regclass
),
expected_columns as (
  select e.relation, split_part(c.definition, ' ', 1) as name, c.definition
  from expected e
  cross join lateral unnest(string_to_array(e.columns, ', ')) c(definition)
),
found as (
  select
    c.relname,
    a.attname,
    format('%s %s%s%s', a.attname, format_type(a.atttypid, a.atttypmod),
           case when a.attnotnull then ' not null' end,
           case when a.attidentity <> '' then ' identity' when a.atthasdef then ' default' end) as definition
  from pg_class c
  join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
  where c.relnamespace = (select h.oid from home h) and c.relkind in ('r', 'p')
),
lost as (
  select e.relation, e.name, e.definition, count(*) over (partition by e.relation) as columns
  from expected_columns e
  where exists (select from found t where t.relname = e.relation)
    and not exists (select from found f where f.relname = e.relation and f.attname = e.name)
),
foreign_columns as (
  select f.relname, f.attname, f.definition, count(*) over (partition by f.relname) as columns
  from found f
  where f.relname in (select e.relation from expected e)
    and not exists (select from expected_columns e where e.relation = f.relname and e.name = f.attname)
),
-- Where one is missing and one is there instead. Of several nobody could tell which is which.
renamed as (
  select l.relation, l.name, f.attname
  from lost l
  join foreign_columns f on f.relname = l.relation
  where l.columns = 1 and f.columns = 1
    and substr(l.definition, length(l.name) + 1) = substr(f.definition, length(f.attname) + 1)
)
select 'tables' as "check", format('table %s is missing', e.relation) as subject, null as remedy
from expected e
where not exists (select from found f where f.relname = e.relation)
union all
select
  'tables',
  case
    when f.definition is null then format('column %s of table %s is missing', e.name, e.relation)
    else format('column %s of table %s is %s', e.name, e.relation, f.definition)
  end,
  format('make it what it was: %s', e.definition)
from expected_columns e
left join found f on f.relname = e.relation and f.attname = e.name
where f.definition is distinct from e.definition and exists (select from found t where t.relname = e.relation)
  and not exists (select from renamed r where r.relation = e.relation and r.name = e.name)
union all
select 'tables', format('column %I of table %I is named %I', r.name, r.relation, r.attname),
       format('alter table pgonce.%I rename column %I to %I', r.relation, r.attname, r.name)
from renamed r
union all
-- What pgonce writes has no value for it, and what it answers has a column more. Where others are missing it may be one of
-- them, and is not to be dropped.
select 'tables', format('column %I of table %I is none of pgonce', f.attname, f.relname),
       case when f.relname not in (select l.relation from lost l)
         then format('alter table pgonce.%I drop column %I', f.relname, f.attname) end
from foreign_columns f
where not exists (select from renamed r where r.relation = f.relname)
union all
select 'tables', format('table %s has row security', c.oid::regclass),
       format('alter table %s disable row level security, no force row level security', c.oid::regclass)
from pg_class c
where c.relnamespace = (select h.oid from home h) and c.relkind = 'r' and (c.relrowsecurity or c.relforcerowsecurity)
union all
select 'unlogged-tables', format('table %s is unlogged', c.oid::regclass), format('alter table %s set logged', c.oid::regclass)
from pg_class c
where c.relpersistence <> 'p' and c.relkind = 'r'
  and (c.relnamespace = (select h.oid from home h) or c.oid in (select s.relation from pgonce.state_tables s))
order by 1, 2
