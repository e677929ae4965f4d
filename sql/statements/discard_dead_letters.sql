select count(*) filter (where was_settled) as settled
from pgonce.discard_dead_letters($1)
