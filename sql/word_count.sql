-- The built-in consumer: counts the words of messages whose payload is {"word": ...}.
-- In the order of the words, so that two partitions that count the same words wait for each other but never deadlock.
insert into word_counts as total (consumer, word, count)
select consumer, payload ->> 'word', count(*)
from received
group by 1, 2
order by 1, 2
on conflict (consumer, word) do update
set count = total.count + excluded.count
