-- The lock that a relay takes first. It passes over a partition where another relay has it, whose messages would then be
-- missed: so it is waited for.
select p.partition
from pgonce.partitions p
join pgonce.topics t on t.topic_id = p.topic_id
where t.topic = $1
order by p.partition
for no key update of p
