select count(*) filter (where was_settled) as settled
from pgonce.replay_dead_letters($1)
