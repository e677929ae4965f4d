with received as materialized (
  select test.id_of(:consumer) as consumer_id, r.partition, r."offset", r.message_id, r.key
  from :received r
),
applied as (
  insert into test.applied (consumer_id, partition, "offset", message_id, key)
  select r.consumer_id, r.partition, r."offset", r.message_id, r.key from received r
)
insert into test.totals as t (consumer_id, partition, total)
select r.consumer_id, r.partition,
       count(*) + coalesce((
         select b.total from test.totals b where b.consumer_id = r.consumer_id and b.partition = r.partition), 0)
from received r
group by r.consumer_id, r.partition
on conflict (consumer_id, partition) do update set total = excluded.total
returning t.total
