-- Events with their words, in order: record, count and staged output. A duplicate changes nothing and is told the count.
--
-- process_once stands in a subquery of one row: joined, it would be planned for a thousand, and so dearly that JIT compiles
-- it for a second. Under the lock of lock.sql, so this snapshot holds all that other nodes have counted.
with lines as (
  select l.event_id, l.word collate "C" as word, l.nth
  from unnest($2::text[], $3::text[]) with ordinality l(event_id, word, nth)
),
processed as materialized (
  select
    l.event_id,
    l.word,
    l.nth,
    (select p.was_duplicate from pgonce.process_once($1, l.event_id) p) as was_duplicate
  from lines l
),
counted as materialized (
  select
    p.event_id,
    p.word,
    p.nth,
    p.was_duplicate,
    coalesce((select w.count from pgonce.word_counts w where w.consumer = $1 and w.word = p.word), 0)
      + count(*) filter (where not p.was_duplicate) over (partition by p.word order by p.nth) as count
  from processed p
),
stored as (
  insert into pgonce.word_counts as total (consumer, word, count)
  select $1, c.word, count(*)
  from counted c
  where not c.was_duplicate
  group by c.word
  order by c.word
  on conflict (consumer, word) do update
  set count = total.count + excluded.count
),
staged as (
  insert into pgonce_node.outputs (event_id, word, count)
  select c.event_id, c.word, c.count
  from counted c
  where not c.was_duplicate
  order by c.nth
)
select c.count, c.was_duplicate
from counted c
order by c.nth
