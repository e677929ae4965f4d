-- An upgrade is also what is run first on a logical replica that was promoted.
do $$
begin
  perform pgonce.restore_sequence();
end $$;
