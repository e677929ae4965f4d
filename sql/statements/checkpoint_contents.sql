select part, name, next_offset, messages, gone, row_count
from pgonce.checkpoint_contents
where consumer = $1 and checkpoint = $2
order by part, name
