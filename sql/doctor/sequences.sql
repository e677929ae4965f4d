-- Sequences that fell behind their tables, as on a logical replica that was promoted, and one that does not draw as it must.
--
-- Indexes: outbox_in_order and the primary keys.
with home as (
  select c.relnamespace as oid from pg_class c where c.oid = 'pgonce.schema_versions'::regclass
),
drawn as (
  select
    case when s.is_called then s.last_value else s.last_value - 1 end as last_value,
    greatest(
      (select max(h.floor) from pgonce.heads h),
      (select max(o.seq)
       from pgonce.partitions p
       cross join lateral (
         select x.seq from pgonce.outbox x
         where x.topic_id = p.topic_id and x.partition = p.partition
         order by x.seq desc
         limit 1) o)) as used
  from pgonce.outbox_seq s
),
identities as (
  select 'topics' as relation, 'topic_id' as name, max(t.topic_id)::bigint as used from pgonce.topics t
  union all
  select 'consumers', 'consumer_id', max(c.consumer_id) from pgonce.consumers c
  union all
  select 'dead_letters', 'dead_letter_id', max(d.dead_letter_id) from pgonce.dead_letters d
  union all
  select 'checkpoints', 'checkpoint_id', max(c.checkpoint_id) from pgonce.checkpoints c
)
select
  'sequences' as "check",
  format('sequence outbox_seq stands at %s, behind %s', d.last_value, d.used) as subject,
  format('select setval(%L, %s)', 'pgonce.outbox_seq', d.used) as remedy
from drawn d
where d.last_value < d.used
union all
select
  'sequences',
  format('the sequence of %s.%s stands at %s, behind %s', i.relation, i.name, coalesce(q.drawn, 0), i.used),
  format('select setval(%L, %s)', q.sequence, i.used)
from identities i
cross join lateral (
  select x.name as sequence, pg_sequence_last_value(x.name::regclass) as drawn
  from pg_get_serial_sequence((select h.oid::regnamespace::text from home h) || '.' || i.relation, i.name) x(name)) q
where i.used > coalesce(q.drawn, 0)
union all
select
  'sequence-settings',
  format('sequence outbox_seq has cache %s and increment %s%s', s.seqcache, s.seqincrement, case when s.seqcycle then ', and cycles' end),
  'alter sequence pgonce.outbox_seq cache 1 increment 1 no cycle'
from pg_sequence s
where s.seqrelid = 'pgonce.outbox_seq'::regclass and (s.seqcache <> 1 or s.seqincrement <> 1 or s.seqcycle)
