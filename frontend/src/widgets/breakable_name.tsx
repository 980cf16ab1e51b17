import { Fragment } from "preact";

/** The name of a unit, which a narrow place may break after its dots and nowhere else. */
export function BreakableName({ name }: { name: string }) {
  return name.split(".").map((part, index) => (
    <Fragment key={index}>
      {index > 0 && (
        <>
          .<wbr />
        </>
      )}
      {part}
    </Fragment>
  ));
}
