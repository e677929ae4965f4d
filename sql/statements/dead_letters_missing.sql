-- Which of these ids name no dead letter, settled or not.
select i.dead_letter_id
from unnest($1::bigint[]) i(dead_letter_id)
where not exists (select from pgonce.dead_letter_list d where d.dead_letter_id = i.dead_letter_id)
order by i.dead_letter_id
limit 1
