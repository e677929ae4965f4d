-- The built-in consumer: counts the words of messages whose payload is {"word": …}.
-- In the order of the words, so that two partitions that count the same words wait for each other but never deadlock.
insert into word_counts as total (consumer, word, count)
select counted.consumer, counted.word, counted.count
from (
  select r.consumer, r.payload ->> 'word' as word, count(*) as count
  from received r
  group by r.consumer, r.payload ->> 'word') counted
order by counted.word collate "C"
on conflict (consumer, word) do update
set count = total.count + excluded.count
