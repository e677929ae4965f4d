-- The built-in consumer that sends on: each word of messages whose payload is {"text": ...} becomes a message {"word": ...} of the
-- topic words, in the order of the text. A payload without text fails. A key has 255 bytes at the most, 60 characters fit.
select count(*)
from received
cross join lateral regexp_matches(jsonb_path_query_first(payload, 'strict $.text') #>> '{}', '\w+', 'g')
  with ordinality found(word, nth)
cross join lateral emit(
  'words', jsonb_build_object('word', lower(found.word[1])), consumer, message_id, found.nth::integer,
  key => left(lower(found.word[1]), 60)) sent
