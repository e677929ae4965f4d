-- What a view does, as a plan without costs: no other text of it is the same in all versions of PostgreSQL. The parameter
-- stands for the view, or for its query in parentheses.
explain (verbose, costs off) select * from $1 as shown
