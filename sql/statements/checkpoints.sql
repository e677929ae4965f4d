select consumer, checkpoint, taken_at::text as taken_at, taken_by::text as taken_by, is_scheduled, row_count, messages, gone
from pgonce.checkpoint_list
where $1::text is null or consumer = $1
order by consumer, taken_at
