// Why a unit got its format, in one sentence, from the numbers that decided it.
import type { CurvePoint, UnitExplanation } from "../api/contract";
import { bytesText, MIB, percentText, signedText, significant } from "./quantities";

type PricedPoint = CurvePoint & { price: number; loss: number; bytes: number };

function isPriced(point: CurvePoint): point is PricedPoint {
  return point.allowed && point.price !== null && point.loss !== null && point.bytes !== null;
}

/** Returns the sentence, or an empty text where no price is known. */
export function explainChoice(explanation: UnitExplanation): string {
  const priced = explanation.curve.filter(isPriced).sort((a, b) => a.price - b.price);
  const chosen = priced.find((point) => point.chosen);
  if (chosen === undefined || explanation.shadow_price === null) return "";
  if (priced.length === 1) return `${chosen.format} is the only format that is allowed here.`;
  if (explanation.shadow_price === 0) {
    return `Memory does not bind this plan, so a byte is free and ${chosen.format} is taken for its loss.`;
  }
  const rate = `${significant(explanation.shadow_price * MIB)} nats per MiB`;
  const best = priced[0] as PricedPoint;
  if (best === chosen) {
    const next = priced[1] as PricedPoint;
    const more = next.price - chosen.price;
    return (
      `At ${rate}, ${chosen.format} has the least price: its loss and the price of its bytes together. ` +
      `The next, ${next.format}, costs ${significant(more)} more${chosen.price > 0 ? ` (${percentText(more / chosen.price)})` : ""}: ` +
      `${signedText(next.loss - chosen.loss, (x) => significant(x))} nats for ${signedText(next.bytes - chosen.bytes, bytesText)}.`
    );
  }
  return (
    `At ${rate}, ${best.format} would be ${significant(chosen.price - best.price)} cheaper than ${chosen.format}. ` +
    "Formats come whole: near the limit a unit may move off its cheapest one so that the plan uses what is left."
  );
}
