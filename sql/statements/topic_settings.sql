select t.topic, t.partitions, t.payload_bytes_max, t.paused,
       array(select c.consumer from pgonce.consumers c where c.topic_id = t.topic_id order by c.consumer) as consumers
from pgonce.topics t
where $1::text is null or t.topic = $1
order by t.topic
