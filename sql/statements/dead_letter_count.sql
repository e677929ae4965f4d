-- How many dead letters there are at this moment, which it answers too: whoever goes over them afterwards, up to that
-- moment, meets none of those that come in meanwhile. The same filters as dead_letters.
with moment as materialized (
  select clock_timestamp() as looked_at
)
select m.looked_at, count(d.dead_letter_id) as count
from moment m
left join pgonce.dead_letter_list d
  on d.state = 'dead'
  and ($1::text is null or d.consumer = $1)
  and ($2::text is null or d.topic = $2)
  and ($3::text is null or d.key = $3)
  and ($4::text is null or strpos(d.error, $4) > 0)
  and d.failed_at <= m.looked_at - coalesce($5::float8, 0) * interval '1 second'
  and ($6::float8 is null or d.failed_at >= m.looked_at - $6 * interval '1 second')
group by m.looked_at
